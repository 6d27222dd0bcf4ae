"""The server: OpenAI's API over models with plans, for `adaskip-cpp serve`. Start at :func:`.app.make_app`."""
