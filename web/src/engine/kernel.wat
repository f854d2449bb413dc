;; y = (steps @ x) * scale + bias for int8 rows, 16 columns at a time.
;; The same as plainMatmul() in matmul.ts; sizes are numbers, not bytes.
(module
  (import "env" "memory" (memory 1))
  (func (export "matmul")
    (param $x i32) (param $steps i32) (param $scale i32) (param $bias i32)
    (param $y i32) (param $T i32) (param $rows i32) (param $cols i32)
    (local $r i32) (local $t i32) (local $w i32) (local $end i32)
    (local $p i32) (local $v v128) (local $h v128)
    (local $a v128) (local $b v128)
    (loop $row
      (local.set $t (i32.const 0))
      (loop $token
        (local.set $w (i32.add (local.get $steps)
          (i32.mul (local.get $r) (local.get $cols))))
        (local.set $end (i32.add (local.get $w) (local.get $cols)))
        (local.set $p (i32.add (local.get $x) (i32.shl
          (i32.mul (local.get $t) (local.get $cols)) (i32.const 2))))
        (local.set $a (v128.const f32x4 0 0 0 0))
        (local.set $b (v128.const f32x4 0 0 0 0))
        (loop $column                 ;; 16 weights times 16 numbers
          (local.set $v (v128.load (local.get $w)))
          (local.set $h (i16x8.extend_low_i8x16_s (local.get $v)))
          (local.set $a (f32x4.add (local.get $a) (f32x4.mul
            (f32x4.convert_i32x4_s
              (i32x4.extend_low_i16x8_s (local.get $h)))
            (v128.load (local.get $p)))))
          (local.set $b (f32x4.add (local.get $b) (f32x4.mul
            (f32x4.convert_i32x4_s
              (i32x4.extend_high_i16x8_s (local.get $h)))
            (v128.load offset=16 (local.get $p)))))
          (local.set $h (i16x8.extend_high_i8x16_s (local.get $v)))
          (local.set $a (f32x4.add (local.get $a) (f32x4.mul
            (f32x4.convert_i32x4_s
              (i32x4.extend_low_i16x8_s (local.get $h)))
            (v128.load offset=32 (local.get $p)))))
          (local.set $b (f32x4.add (local.get $b) (f32x4.mul
            (f32x4.convert_i32x4_s
              (i32x4.extend_high_i16x8_s (local.get $h)))
            (v128.load offset=48 (local.get $p)))))
          (local.set $w (i32.add (local.get $w) (i32.const 16)))
          (local.set $p (i32.add (local.get $p) (i32.const 64)))
          (br_if $column (i32.lt_u (local.get $w) (local.get $end))))
        (local.set $a (f32x4.add (local.get $a) (local.get $b)))
        (f32.store
          (i32.add (local.get $y) (i32.shl (i32.add (local.get $r)
            (i32.mul (local.get $t) (local.get $rows))) (i32.const 2)))
          (f32.add
            (f32.load (i32.add (local.get $bias)
              (i32.shl (local.get $r) (i32.const 2))))
            (f32.mul
              (f32.load (i32.add (local.get $scale)
                (i32.shl (local.get $r) (i32.const 2))))
              (f32.add
                (f32.add (f32x4.extract_lane 0 (local.get $a))
                  (f32x4.extract_lane 1 (local.get $a)))
                (f32.add (f32x4.extract_lane 2 (local.get $a))
                  (f32x4.extract_lane 3 (local.get $a)))))))
        (local.set $t (i32.add (local.get $t) (i32.const 1)))
        (br_if $token (i32.lt_u (local.get $t) (local.get $T))))
      (local.set $r (i32.add (local.get $r) (i32.const 1)))
      (br_if $row (i32.lt_u (local.get $r) (local.get $rows))))))
