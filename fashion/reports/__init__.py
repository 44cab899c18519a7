"""The Parquet reports, the console, and the page."""
