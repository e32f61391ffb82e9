"""The `elasticmoe` command."""
