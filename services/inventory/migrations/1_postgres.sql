-- What there is of each product. `held` is part of `quantity`.
CREATE TABLE inventory_product (
    id       text   PRIMARY KEY,
    initial  bigint NOT NULL,
    quantity bigint NOT NULL CHECK (quantity >= 0),
    held     bigint NOT NULL DEFAULT 0 CHECK (held >= 0 AND held <= quantity)
);

-- Every order that was heard of; `ended_by` is the type of its end event. An ended order gets no reservation any more.
CREATE TABLE inventory_order (
    id       uuid PRIMARY KEY,
    ended_by text
);

CREATE TABLE inventory_reservation (
    id         uuid        PRIMARY KEY,
    order_id   uuid        NOT NULL REFERENCES inventory_order (id),
    user_id    uuid        NOT NULL,
    product_id text        NOT NULL REFERENCES inventory_product (id),
    quantity   bigint      NOT NULL CHECK (quantity > 0),
    state      text        NOT NULL CHECK (state IN ('held', 'confirmed', 'released')),
    expires_at timestamptz NOT NULL,
    ended_at   timestamptz
);
-- However often a request is repeated, an order has one live reservation of a product.
CREATE UNIQUE INDEX inventory_reservation_live ON inventory_reservation (order_id, product_id)
    WHERE state IN ('held', 'confirmed');

CREATE TABLE inventory_restock (
    id         uuid        PRIMARY KEY,
    product_id text        NOT NULL REFERENCES inventory_product (id),
    quantity   bigint      NOT NULL CHECK (quantity > 0),
    arrived_at timestamptz NOT NULL
);

-- One row for each event that was applied. Nothing here is unique on purpose: an effect that happened twice shows.
CREATE TABLE inventory_effect (
    id         bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id   text        NOT NULL,
    event_type text        NOT NULL,
    order_id   uuid        NOT NULL,
    released   bigint      NOT NULL,
    applied_at timestamptz NOT NULL
);
CREATE INDEX inventory_effect_event ON inventory_effect (event_id);
