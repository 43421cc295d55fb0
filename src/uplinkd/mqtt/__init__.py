"""Device door 2: MQTT 3.1.1 and 3.1 in the platform's subset (QoS 0 and 1, no wills, no retained messages)."""
