"""Plain data about a model: identity, statistics, maps, costs, profiles and plans, and their files."""
