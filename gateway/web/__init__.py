"""The unprivileged HTTP process.

One request, in the order of the modules it passes: server (HTTP hygiene) → middleware (request id, envelope, access log) →
handlers → rates → body → tokens → launcher FIND or CREATE → leases → runs → launcher RUN and runner frames → verdicts → answer.
"""
