"""The Ray cluster: connect, plan, check; one driver at a time."""
