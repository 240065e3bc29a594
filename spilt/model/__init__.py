"""A model as it is loaded: the checkpoint's files, its chat template, and the host that holds both."""
