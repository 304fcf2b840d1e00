//! The hash that orders the names of an indexed directory: half of MD4, seeded (`fs/ext4/hash.c`).

/// The hash of a name and the minor hash behind it. The lowest bit is clear: it marks a run of equal hashes that goes on
/// in the next block.
#[must_use]
pub fn name_hash(name: &[u8], seed: &[u32; 4]) -> (u32, u32) {
    let mut state = *seed;
    if state == [0; 4] {
        state = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];
    }
    let mut rest = name;
    while !rest.is_empty() {
        transform(&mut state, &words(rest));
        rest = rest.get(32..).unwrap_or_default();
    }
    let [_, hash, minor, _] = state;
    let hash = hash & !1;
    // The highest hash marks the end of a directory (`EXT4_HTREE_EOF_32BIT`).
    (if hash == 0xffff_fffe { 0xffff_fffc } else { hash }, minor)
}

/// The next 32 bytes as words, padded with the remaining length (`str2hashbuf_signed`).
fn words(rest: &[u8]) -> [u32; 8] {
    let length = u32::try_from(rest.len()).unwrap_or(u32::MAX);
    let pad = length | length << 8;
    let pad = pad | pad << 16;
    let mut words = [pad; 8];
    for (word, bytes) in words.iter_mut().zip(rest.chunks(4)) {
        for byte in bytes {
            *word = (*word << 8).wrapping_add(i32::from(*byte as i8) as u32);
        }
    }
    words
}

/// `half_md4_transform`.
fn transform(state: &mut [u32; 4], words: &[u32; 8]) {
    const K2: u32 = 0x5a82_7999;
    const K3: u32 = 0x6ed9_eba1;
    let choose = |x: u32, y: u32, z: u32| z ^ (x & (y ^ z));
    let majority = |x: u32, y: u32, z: u32| (x & y).wrapping_add((x ^ y) & z);
    let parity = |x: u32, y: u32, z: u32| x ^ y ^ z;

    let [w0, w1, w2, w3, w4, w5, w6, w7] = *words;
    let mut s = *state;
    // Each step replaces the first word, and the words rotate so that the next one is first.
    let mut step = |f: &dyn Fn(u32, u32, u32) -> u32, word: u32, shift: u32| {
        let [a, b, c, d] = s;
        let a = a.wrapping_add(f(b, c, d)).wrapping_add(word).rotate_left(shift);
        s = [d, a, b, c];
    };
    for (word, shift) in [w0, w1, w2, w3, w4, w5, w6, w7].into_iter().zip([3, 7, 11, 19].into_iter().cycle()) {
        step(&choose, word, shift);
    }
    for (word, shift) in [w1, w3, w5, w7, w0, w2, w4, w6].into_iter().zip([3, 5, 9, 13].into_iter().cycle()) {
        step(&majority, word.wrapping_add(K2), shift);
    }
    for (word, shift) in [w3, w7, w2, w6, w1, w5, w0, w4].into_iter().zip([3, 9, 11, 15].into_iter().cycle()) {
        step(&parity, word.wrapping_add(K3), shift);
    }
    for (word, add) in state.iter_mut().zip(s) {
        *word = word.wrapping_add(add);
    }
}
