CREATE TABLE prices (item VARCHAR, price DOUBLE, PRIMARY KEY (item) NOT ENFORCED) WITH (topic = 'prices');
