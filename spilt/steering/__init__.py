"""What is done to a model: where (Site), what is added there (an intervention), and both together (Steering)."""

from spilt.steering.steering import Site, Steering

__all__ = ["Site", "Steering"]
