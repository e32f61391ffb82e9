"""[1] The HTTP side: requests in, targets for the coordinator [2] out, its operations back as JSON.

`router.build_router` makes the routes, to be mounted in front of SGLang's own; `types` are the payloads, for clients
too.
"""
