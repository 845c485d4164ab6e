CREATE TABLE bid (auction BIGINT, bidder BIGINT, price DOUBLE, channel VARCHAR, tags VARCHAR[], info STRUCT(page VARCHAR), ts TIMESTAMP, WATERMARK FOR ts AS ts - INTERVAL '4' SECOND) WITH (topic = 'bid');
CREATE TABLE auction (id BIGINT, seller BIGINT, ts TIMESTAMP, WATERMARK FOR ts AS ts) WITH (topic = 'auction');
INSERT INTO auction SELECT b.auction AS id, b.bidder AS seller, b.ts FROM bid AS b LEFT JOIN auction AS a ON a.id = b.auction AND b.ts BETWEEN a.ts AND a.ts + INTERVAL '1' HOUR;
