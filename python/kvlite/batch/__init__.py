"""`kvlite batch`: a file of requests in OpenAI's batch format, answered by an engine in this process.

source.py reads and checks the file and says in which order it is fed, sink.py keeps the answers, run.py brings the two
together over `Engine.run`. What a body means is the server's word (kvlite.server.calls), without its HTTP.
"""
