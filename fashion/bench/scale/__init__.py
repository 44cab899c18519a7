"""A search at the scale of a cluster, measured with trials that train nothing: growth, kills, placement, a slow store."""
