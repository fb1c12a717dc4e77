"""The method of the paper: gates, hypernetwork, relaxations, losses, and the student they make of a dense model."""
