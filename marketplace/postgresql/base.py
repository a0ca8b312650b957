"""Django's backend, which asks whether its server still listens without a question to it."""

import select

from django.db.backends.postgresql import base


class DatabaseWrapper(base.DatabaseWrapper):
    def is_usable(self) -> bool:
        """A server that has gone has said so: then there is something to read, and only then it is asked."""
        if self.connection is None:
            return False
        waiting = select.poll()
        waiting.register(self.connection.pgconn.socket, select.POLLIN)
        return True if not waiting.poll(0) else bool(super().is_usable())
