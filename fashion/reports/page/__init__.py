"""The report page: one HTML file made of the Parquet reports, with figures, and the same figures as PNG files."""
