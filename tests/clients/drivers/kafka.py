"""Tells a test what is in each partition of a topic: what is there, then each message as it comes, one JSON event a line."""

import json
import sys

from confluent_kafka import Consumer, TopicPartition


def main() -> None:
    broker, topic, partitions = sys.argv[1:]
    consumer = Consumer({"bootstrap.servers": broker, "group.id": "test", "enable.auto.commit": False})
    consumer.assign([TopicPartition(topic, number, 0) for number in range(int(partitions))])
    while True:
        message = consumer.poll(1)
        if message is None:
            continue
        if message.error():
            raise SystemExit(str(message.error()))
        told = {
            "event": "message",
            "partition": message.partition(),
            "key": message.key().decode(),
            "payload": message.value().decode(),
            "time": message.timestamp()[1],
            **{name: value.decode() for name, value in message.headers()},
        }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
