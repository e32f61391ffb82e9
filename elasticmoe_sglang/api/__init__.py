"""[1] The HTTP API: turns requests into targets for the coordinator [2] and returns its operations as JSON.

`router.build_router` builds the routes, mounted in front of SGLang's own; `elastic_ep` is what they, SGLang's tokenizer
manager and an Engine call; `types` has the payloads, also for clients.
`feed` has the events, `page` the operator's page.
"""
