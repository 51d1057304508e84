-- What there is of each product. `held` is part of `quantity`.
CREATE TABLE inventory_product (
    id       TEXT    PRIMARY KEY,
    initial  INTEGER NOT NULL,
    quantity INTEGER NOT NULL CHECK (quantity >= 0),
    held     INTEGER NOT NULL DEFAULT 0 CHECK (held >= 0 AND held <= quantity)
);

-- Every order that was heard of; `ended_by` is the type of its end event. An ended order gets no reservation any more.
CREATE TABLE inventory_order (
    id       TEXT PRIMARY KEY,
    ended_by TEXT
);

CREATE TABLE inventory_reservation (
    id         TEXT    PRIMARY KEY,
    order_id   TEXT    NOT NULL REFERENCES inventory_order (id),
    user_id    TEXT    NOT NULL,
    product_id TEXT    NOT NULL REFERENCES inventory_product (id),
    quantity   INTEGER NOT NULL CHECK (quantity > 0),
    state      TEXT    NOT NULL CHECK (state IN ('held', 'confirmed', 'released')),
    expires_at TEXT    NOT NULL,
    ended_at   TEXT
);
-- However often a request is repeated, an order has one live reservation of a product.
CREATE UNIQUE INDEX inventory_reservation_live ON inventory_reservation (order_id, product_id)
    WHERE state IN ('held', 'confirmed');

CREATE TABLE inventory_restock (
    id         TEXT    PRIMARY KEY,
    product_id TEXT    NOT NULL REFERENCES inventory_product (id),
    quantity   INTEGER NOT NULL CHECK (quantity > 0),
    arrived_at TEXT    NOT NULL
);

-- One row for each event that was applied. Nothing here is unique on purpose: an effect that happened twice shows.
CREATE TABLE inventory_effect (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id   TEXT    NOT NULL,
    event_type TEXT    NOT NULL,
    order_id   TEXT    NOT NULL,
    released   INTEGER NOT NULL,
    applied_at TEXT    NOT NULL
);
CREATE INDEX inventory_effect_event ON inventory_effect (event_id);
