"""The page that shows all reports, and its figures."""
