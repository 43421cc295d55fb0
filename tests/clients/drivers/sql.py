"""Carries out SQL for a test, in the environment of the recipes: one JSON command a line, one JSON event a line."""

import json
import sys

from sqlalchemy import Connection, create_engine, text


def main() -> None:
    engine = create_engine(sys.argv[1], isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for line in sys.stdin:
            print(json.dumps(_answer(connection, json.loads(line)["sql"])), flush=True)


def _answer(connection: Connection, statement: str) -> dict[str, object]:
    done = connection.execute(text(statement))
    rows = [[_plain(value) for value in row] for row in done] if done.returns_rows else []
    return {"event": "done", "rows": rows}


def _plain(value: object) -> object:
    return value.decode() if isinstance(value, bytes) else value if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
