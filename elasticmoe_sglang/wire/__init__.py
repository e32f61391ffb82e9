"""What processes say to each other: an envelope and a codec, and the messages, one module for each receiver.

A request stands beside its reply, in the module of the request's receiver. What is reported unasked stands in the
module of the report's receiver. The commit travels by SGLang's broadcast and has no reply on the line it came by, so
what ranks say of it are reports.
"""
