"""Classes of ofadiff that pass for classes of diffusers, and what they refuse to do."""
