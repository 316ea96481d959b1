"""Names in a recipe become local files: from the hub, from this machine, or the quickstart model."""
