"""The endpoint over HTTP: the application, OpenAI's protocol, the proxy middleware, the playground."""
