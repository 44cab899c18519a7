"""Hyperparameter search on Ray Tune: space, sampler, scheduler, trials, and what a search stores to resume."""
