"""Delivery to the owner's backends: consumer groups over AMQP and by webhook, and what happens to devices as messages."""
