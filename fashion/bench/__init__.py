"""Side-by-side measurements: what `jobs.bench` runs."""
