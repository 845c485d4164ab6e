CREATE TABLE bid (auction BIGINT, bidder BIGINT, price DOUBLE, channel VARCHAR, tags VARCHAR[], info STRUCT(page VARCHAR), ts TIMESTAMP, WATERMARK FOR ts AS ts - INTERVAL '4' SECOND) WITH (topic = 'bid');
CREATE TABLE rate (channel VARCHAR METADATA FROM 'key', factor DOUBLE, ts TIMESTAMP, WATERMARK FOR ts AS ts, PRIMARY KEY (channel) NOT ENFORCED) WITH (topic = 'rate');
SELECT b.auction, b.price * r.factor AS price FROM bid AS b JOIN rate FOR SYSTEM_TIME AS OF b.ts AS r ON b.channel = r.channel;
