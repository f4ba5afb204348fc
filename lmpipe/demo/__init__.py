"""The demonstration: a real workload through every tier, in real processes, checked token by token."""
