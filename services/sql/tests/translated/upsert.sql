CREATE TABLE prices (item VARCHAR METADATA FROM 'key', price DOUBLE, PRIMARY KEY (item) NOT ENFORCED) WITH (topic = 'prices');
