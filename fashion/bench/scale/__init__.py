"""A search at the scale of a cluster, with trials that train nothing: growth, kills, placement, a slow store."""
