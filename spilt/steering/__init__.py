"""What is done to a model: sites, interventions, Steering, the families' anatomy, and the only hooks."""
