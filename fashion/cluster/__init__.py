"""The Ray cluster: connect to one or start one, fit a run to it, check its nodes, and lock a run's name."""
