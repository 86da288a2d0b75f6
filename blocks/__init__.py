"""Facts of a site, editable in the Prefect UI."""
