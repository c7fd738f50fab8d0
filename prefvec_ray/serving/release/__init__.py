"""What is served, fixed to versions: the release, rolling it out, routing to it, its records."""
