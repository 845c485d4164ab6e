CREATE TABLE bid (auction BIGINT, bidder BIGINT, price DOUBLE, channel VARCHAR, tags VARCHAR[], info STRUCT(page VARCHAR), ts TIMESTAMP, WATERMARK FOR ts AS ts - INTERVAL '4' SECOND) WITH (topic = 'bid');
SELECT b.auction, r.price FROM bid AS b LEFT JOIN bid FOR SYSTEM_TIME AS OF PROCTIME() AS r ON b.channel = r.channel;
