"""From kept units to a physically smaller model."""
