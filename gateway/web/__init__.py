"""The unprivileged HTTP process.

One request, in the order of the modules it passes: door (who may connect) → connection and server (HTTP hygiene) → middleware
(caller, request id, envelope, access log) → handlers → breaker → rates → body → leases (a ticket, or 503) → tokens → leases (the
turn) → runs → launcher RUN and runner frames → verdicts → answer. Without a token the launcher's CREATE follows the turn: what is
refused makes nothing. A token that is no good ends at the launcher's FIND.
"""
