"""Puts what devices report into the table `uplink` of PostgreSQL or MariaDB, each message once: python to_sql.py

The table is made by postgresql.sql or mariadb.sql. DATABASE_URL is postgresql+psycopg://… or mysql+pymysql://…
"""

import os
from dataclasses import asdict

from sqlalchemy import create_engine, text
from uplink import Report, run

engine = create_engine(os.environ["DATABASE_URL"], pool_pre_ping=True, hide_parameters=True)
# A message that comes again changes nothing. INSERT IGNORE would do so too in MariaDB, and hide other faults.
ONCE = {"postgresql": "ON CONFLICT DO NOTHING", "mysql": "ON DUPLICATE KEY UPDATE message_id = message_id"}
INSERT = (
    "INSERT INTO uplink (message_id, stored_at, topic, product_key, device_name, origin, payload)"
    " VALUES (:message_id, :stored_at, :topic, :product_key, :device_name, :origin, :payload) "
)


def write(reports: list[Report]) -> None:
    with engine.begin() as connection:  # commits at its end; only then is the batch acknowledged
        connection.execute(text(INSERT + ONCE[engine.dialect.name]), [asdict(report) for report in reports])


if __name__ == "__main__":
    run(write)
