CREATE TABLE IF NOT EXISTS uplink (
    message_id bigint PRIMARY KEY,
    stored_at datetime(6) NOT NULL, -- UTC
    topic varchar(512) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    product_key varchar(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    device_name varchar(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    origin varchar(16) CHARACTER SET ascii NOT NULL,
    payload longblob NOT NULL, -- as JSON: JSON_VALUE(CONVERT(payload USING utf8mb4), '$.on')
    KEY uplink_of_device (product_key, device_name, stored_at)
);
