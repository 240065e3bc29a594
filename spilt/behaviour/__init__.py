"""Behaviours of the user's own: a YAML file says what is asked, how an answer is judged and what it may cost; measured on a model."""
