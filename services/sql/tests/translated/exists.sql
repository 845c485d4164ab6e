CREATE TABLE bid (auction BIGINT, bidder BIGINT, price DOUBLE, channel VARCHAR, tags VARCHAR[], info STRUCT(page VARCHAR), ts TIMESTAMP, WATERMARK FOR ts AS ts - INTERVAL '4' SECOND) WITH (topic = 'bid');
SELECT b.price FROM bid AS b WHERE EXISTS(SELECT 1 FROM bid AS o WHERE o.auction = b.bidder);
