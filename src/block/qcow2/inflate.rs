//! Decompressing one cluster. Pure, except for the time it takes: call it on the thread pool.

use super::FormatError;
use super::header::Compression;

/// Decompresses a cluster of `size` bytes. `input` may go on behind it (sectors are shared), but must not end before.
///
/// # Errors
/// `Compressed` unless exactly `size` bytes come out.
pub(super) fn decompress(kind: Compression, input: &[u8], size: usize) -> Result<Vec<u8>, FormatError> {
    let bad = |what: String| FormatError::Compressed(what);
    let mut out = vec![0; size];
    match kind {
        Compression::Zlib => {
            let mut d = flate2::Decompress::new(false);
            d.decompress(input, &mut out, flate2::FlushDecompress::Finish)
                .map_err(|e| bad(format!("zlib: {e}")))?;
            if d.total_out() != size as u64 {
                return Err(bad(format!("zlib: {} of {size} bytes", d.total_out())));
            }
        }
        Compression::Zstd => {
            let mut d = zstd::bulk::Decompressor::new().map_err(|e| bad(format!("zstd: {e}")))?;
            let (mut from, mut to) = (0, 0);
            while to < size {
                // A frame at a time, straight into the cluster: no window whose size the file could choose.
                let frame = zstd::zstd_safe::find_frame_compressed_size(&input[from..])
                    .map_err(|e| bad(format!("zstd: {}", zstd::zstd_safe::get_error_name(e))))?;
                let n = d
                    .decompress_to_buffer(&input[from..from + frame], &mut out[to..])
                    .map_err(|e| bad(format!("zstd: {e}")))?;
                if n == 0 && frame == 0 {
                    return Err(bad(format!("zstd: {to} of {size} bytes")));
                }
                (from, to) = (from + frame, to + n);
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster() -> Vec<u8> {
        (0..65536u32).map(|i| (i / 7) as u8).collect()
    }

    #[test]
    fn deflate_with_anything_behind_it() {
        let mut input = Vec::with_capacity(65536);
        flate2::Compress::new(flate2::Compression::default(), false)
            .compress_vec(&cluster(), &mut input, flate2::FlushCompress::Finish)
            .unwrap();
        let len = input.len();
        input.extend([0x5a; 300]);
        assert_eq!(decompress(Compression::Zlib, &input, 65536).unwrap(), cluster());
        assert_eq!(decompress(Compression::Zlib, &input[..len], 65536).unwrap(), cluster());
        assert!(decompress(Compression::Zlib, &input[..len / 2], 65536).is_err());
        assert!(decompress(Compression::Zlib, &input[..len], 65536 * 2).is_err());
        assert!(decompress(Compression::Zlib, &[], 512).is_err());
        assert!(decompress(Compression::Zlib, &[0xff; 100], 512).is_err());
    }

    #[test]
    fn zstd_in_one_or_two_frames_with_anything_behind_them() {
        let mut input = zstd::bulk::compress(&cluster()[..1000], 3).unwrap();
        input.extend(zstd::bulk::compress(&cluster()[1000..], 3).unwrap());
        let len = input.len();
        input.extend([0x5a; 300]);
        assert_eq!(decompress(Compression::Zstd, &input, 65536).unwrap(), cluster());
        assert!(decompress(Compression::Zstd, &input[..len - 1], 65536).is_err());
        assert!(decompress(Compression::Zstd, &input[..len], 65536 * 2).is_err());
        assert!(decompress(Compression::Zstd, &input[..len], 512).is_err());
        assert!(decompress(Compression::Zstd, &[], 512).is_err());
        // An endless row of empty frames ends with the input.
        let empty = zstd::bulk::compress(&[], 3).unwrap().repeat(10);
        assert!(decompress(Compression::Zstd, &empty, 512).is_err());
    }
}
