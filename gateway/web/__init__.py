"""The unprivileged HTTP process.

One request, in the order of the modules it passes: door (who may connect) → connection and server (HTTP hygiene) → middleware
(caller, request id, envelope, access log) → routes → handlers or transfer → admission (breaker, rates, body in its room, a ticket
or 503, tokens, the turn) → runs and run → launcher RUN, channel or dialogue with the runner → verdicts → answer. Without a token
the launcher's CREATE follows the turn: what is refused makes nothing. A token that is no good ends at the launcher's FIND.
"""
