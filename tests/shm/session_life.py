"""Makes a session in the node at argv[1], says its id, and does as told, one word a line."""

import os
import sys

from lmpipe.errors import ProtocolViolation
from lmpipe.shm.hold import Holds
from lmpipe.shm.session import Session, SessionDir

run_dir = sys.argv[1]
session = Session.create(run_dir, entries=4, grants=1)
sessions = SessionDir(run_dir)
print(int(session.id), flush=True)
for line in sys.stdin:
    answer = "done"
    match line.strip():
        case "look":  # all that might open the own file by mistake
            assert sessions.alive(session.id) and session.id in sessions.ids() and sessions.sweep() == []
        case "close":
            session.close()
        case "fork":
            reading, writing = os.pipe()
            if (child := os.fork()) == 0:
                refused = 0
                for use in (lambda: session.id, lambda: session.segment, session.check, lambda: Holds(session)):
                    try:
                        use()
                    except ProtocolViolation:
                        refused += 1
                seen = sessions.alive(session._id) and sessions.sweep() == []
                session.close()
                with Session.create(run_dir, entries=4, grants=1) as own:
                    seen = seen and own.id != session._id and sessions.alive(own.id)
                os.write(writing, f"{refused} {seen}".encode())
                os._exit(0)
            os.waitpid(child, 0)
            answer = os.read(reading, 100).decode()
    print(answer, flush=True)
