"""Puts what devices report into a topic of Kafka, each message at least once: python to_kafka.py

KAFKA is the brokers' host:port,… and KAFKA_TOPIC the topic, `uplink` unless set otherwise.
"""

import os

from confluent_kafka import KafkaError, Message, Producer
from uplink import Report, run

TOPIC = os.environ.get("KAFKA_TOPIC", "uplink")
# Idempotence: acks=all, and what librdkafka sends again by itself neither comes twice nor out of order. After 5 minutes without
# Kafka it gives up, and the batch is sent anew.
SETTINGS = {"bootstrap.servers": os.environ["KAFKA"], "enable.idempotence": True, "linger.ms": 5}
producer = Producer(SETTINGS)


def write(reports: list[Report]) -> None:
    global producer
    faults: list[KafkaError] = []

    def delivered(fault: KafkaError | None, _: Message) -> None:
        if fault:
            faults.append(fault)

    for report in reports:
        producer.produce(
            TOPIC,
            report.payload,
            key=f"{report.product_key}/{report.device_name}",  # one device, one partition: in its order
            headers={
                "id": str(report.message_id),  # the same when a message comes again
                "topic": report.topic,
                "origin": report.origin,
            },
            timestamp=round(report.stored_at.timestamp() * 1000),
            on_delivery=delivered,
        )
    producer.flush()
    if faults:
        producer = Producer(SETTINGS)  # after some faults the old one is refused for ever
        raise RuntimeError(f"{len(faults)} of {len(reports)} messages are not in Kafka: {faults[0]}")


if __name__ == "__main__":
    run(write)
