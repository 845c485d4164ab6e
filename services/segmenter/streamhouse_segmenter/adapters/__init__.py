"""What drives the segmenter: an asyncio loop, nameko on RabbitMQ; and its session with the coordinator."""
