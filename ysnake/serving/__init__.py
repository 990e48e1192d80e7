"""The parts of the server that `ysnake.serve` starts.

`application` has the routes, `service` the model and its queue, `ollama_api` and `openai_api` the
two APIs, `fields` what they read from a request. `guard` refuses strangers, `connections` those
who send half a request, and `error_log` bounds what is logged.
"""
