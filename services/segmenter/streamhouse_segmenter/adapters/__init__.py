"""Drivers of the segmenter: an asyncio loop, nameko on RabbitMQ, the coordinator's feed."""
