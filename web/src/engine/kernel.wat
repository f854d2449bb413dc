;; y = (steps @ x) * scale + bias for int8 rows, 16 columns at a time: the same
;; as plainMatmul() in matmul.ts. Pointers are in bytes, sizes are numbers.
(module
  (import "env" "memory" (memory 1))

  ;; y[t, r] = the sum of the four numbers in $a, times scale[r], plus bias[r]
  (func $store
    (param $a v128) (param $scale i32) (param $bias i32)
    (param $y i32) (param $t i32) (param $r i32) (param $rows i32)
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
              (f32x4.extract_lane 3 (local.get $a))))))))

  ;; One token. ($T is not read: it is 1.)
  (func (export "one")
    (param $x i32) (param $steps i32) (param $scale i32) (param $bias i32)
    (param $y i32) (param $T i32) (param $rows i32) (param $cols i32)
    (local $r i32) (local $w i32) (local $end i32) (local $p i32)
    (local $v v128) (local $h v128) (local $a v128) (local $b v128)
    (local.set $w (local.get $steps))
    (loop $row
      (local.set $end (i32.add (local.get $w) (local.get $cols)))
      (local.set $p (local.get $x))
      (local.set $a (v128.const f32x4 0 0 0 0))
      (local.set $b (v128.const f32x4 0 0 0 0))
      (loop $column                   ;; 16 weights times 16 numbers
        (local.set $v (v128.load (local.get $w)))
        (local.set $h (i16x8.extend_low_i8x16_s (local.get $v)))
        (local.set $a (f32x4.add (local.get $a) (f32x4.mul
          (f32x4.convert_i32x4_s (i32x4.extend_low_i16x8_s (local.get $h)))
          (v128.load (local.get $p)))))
        (local.set $b (f32x4.add (local.get $b) (f32x4.mul
          (f32x4.convert_i32x4_s (i32x4.extend_high_i16x8_s (local.get $h)))
          (v128.load offset=16 (local.get $p)))))
        (local.set $h (i16x8.extend_high_i8x16_s (local.get $v)))
        (local.set $a (f32x4.add (local.get $a) (f32x4.mul
          (f32x4.convert_i32x4_s (i32x4.extend_low_i16x8_s (local.get $h)))
          (v128.load offset=32 (local.get $p)))))
        (local.set $b (f32x4.add (local.get $b) (f32x4.mul
          (f32x4.convert_i32x4_s (i32x4.extend_high_i16x8_s (local.get $h)))
          (v128.load offset=48 (local.get $p)))))
        (local.set $w (i32.add (local.get $w) (i32.const 16)))
        (local.set $p (i32.add (local.get $p) (i32.const 64)))
        (br_if $column (i32.lt_u (local.get $w) (local.get $end))))
      (call $store (f32x4.add (local.get $a) (local.get $b))
        (local.get $scale) (local.get $bias) (local.get $y) (i32.const 0)
        (local.get $r) (local.get $rows))
      (local.set $r (i32.add (local.get $r) (i32.const 1)))
      (br_if $row (i32.lt_u (local.get $r) (local.get $rows)))))

  ;; Four tokens at a time, which share the work of reading the weights; the
  ;; arrays have room for a multiple of four.
  (func (export "four")
    (param $x i32) (param $steps i32) (param $scale i32) (param $bias i32)
    (param $y i32) (param $T i32) (param $rows i32) (param $cols i32)
    (local $r i32) (local $t i32) (local $w i32) (local $end i32)
    (local $x0 i32) (local $x1 i32) (local $x2 i32) (local $x3 i32)
    (local $v v128) (local $h v128) (local $f v128)
    (local $a0 v128) (local $a1 v128) (local $a2 v128) (local $a3 v128)
    (loop $row
      (local.set $t (i32.const 0))
      (local.set $x0 (local.get $x))
      (loop $tokens
        (local.set $w (i32.add (local.get $steps)
          (i32.mul (local.get $r) (local.get $cols))))
        (local.set $end (i32.add (local.get $w) (local.get $cols)))
        (local.set $x1 (i32.add (local.get $x0)
          (i32.shl (local.get $cols) (i32.const 2))))
        (local.set $x2 (i32.add (local.get $x1)
          (i32.shl (local.get $cols) (i32.const 2))))
        (local.set $x3 (i32.add (local.get $x2)
          (i32.shl (local.get $cols) (i32.const 2))))
        (local.set $a0 (v128.const f32x4 0 0 0 0))
        (local.set $a1 (v128.const f32x4 0 0 0 0))
        (local.set $a2 (v128.const f32x4 0 0 0 0))
        (local.set $a3 (v128.const f32x4 0 0 0 0))
        (loop $column
          (local.set $v (v128.load (local.get $w)))
          (local.set $h (i16x8.extend_low_i8x16_s (local.get $v)))
          (local.set $f (f32x4.convert_i32x4_s
            (i32x4.extend_low_i16x8_s (local.get $h))))
          (local.set $a0 (f32x4.add (local.get $a0) (f32x4.mul
            (local.get $f) (v128.load (local.get $x0)))))
          (local.set $a1 (f32x4.add (local.get $a1) (f32x4.mul
            (local.get $f) (v128.load (local.get $x1)))))
          (local.set $a2 (f32x4.add (local.get $a2) (f32x4.mul
            (local.get $f) (v128.load (local.get $x2)))))
          (local.set $a3 (f32x4.add (local.get $a3) (f32x4.mul
            (local.get $f) (v128.load (local.get $x3)))))
          (local.set $f (f32x4.convert_i32x4_s
            (i32x4.extend_high_i16x8_s (local.get $h))))
          (local.set $a0 (f32x4.add (local.get $a0) (f32x4.mul
            (local.get $f) (v128.load offset=16 (local.get $x0)))))
          (local.set $a1 (f32x4.add (local.get $a1) (f32x4.mul
            (local.get $f) (v128.load offset=16 (local.get $x1)))))
          (local.set $a2 (f32x4.add (local.get $a2) (f32x4.mul
            (local.get $f) (v128.load offset=16 (local.get $x2)))))
          (local.set $a3 (f32x4.add (local.get $a3) (f32x4.mul
            (local.get $f) (v128.load offset=16 (local.get $x3)))))
          (local.set $h (i16x8.extend_high_i8x16_s (local.get $v)))
          (local.set $f (f32x4.convert_i32x4_s
            (i32x4.extend_low_i16x8_s (local.get $h))))
          (local.set $a0 (f32x4.add (local.get $a0) (f32x4.mul
            (local.get $f) (v128.load offset=32 (local.get $x0)))))
          (local.set $a1 (f32x4.add (local.get $a1) (f32x4.mul
            (local.get $f) (v128.load offset=32 (local.get $x1)))))
          (local.set $a2 (f32x4.add (local.get $a2) (f32x4.mul
            (local.get $f) (v128.load offset=32 (local.get $x2)))))
          (local.set $a3 (f32x4.add (local.get $a3) (f32x4.mul
            (local.get $f) (v128.load offset=32 (local.get $x3)))))
          (local.set $f (f32x4.convert_i32x4_s
            (i32x4.extend_high_i16x8_s (local.get $h))))
          (local.set $a0 (f32x4.add (local.get $a0) (f32x4.mul
            (local.get $f) (v128.load offset=48 (local.get $x0)))))
          (local.set $a1 (f32x4.add (local.get $a1) (f32x4.mul
            (local.get $f) (v128.load offset=48 (local.get $x1)))))
          (local.set $a2 (f32x4.add (local.get $a2) (f32x4.mul
            (local.get $f) (v128.load offset=48 (local.get $x2)))))
          (local.set $a3 (f32x4.add (local.get $a3) (f32x4.mul
            (local.get $f) (v128.load offset=48 (local.get $x3)))))
          (local.set $w (i32.add (local.get $w) (i32.const 16)))
          (local.set $x0 (i32.add (local.get $x0) (i32.const 64)))
          (local.set $x1 (i32.add (local.get $x1) (i32.const 64)))
          (local.set $x2 (i32.add (local.get $x2) (i32.const 64)))
          (local.set $x3 (i32.add (local.get $x3) (i32.const 64)))
          (br_if $column (i32.lt_u (local.get $w) (local.get $end))))
        (call $store (local.get $a0) (local.get $scale) (local.get $bias)
          (local.get $y) (i32.add (local.get $t) (i32.const 0))
          (local.get $r) (local.get $rows))
        (call $store (local.get $a1) (local.get $scale) (local.get $bias)
          (local.get $y) (i32.add (local.get $t) (i32.const 1))
          (local.get $r) (local.get $rows))
        (call $store (local.get $a2) (local.get $scale) (local.get $bias)
          (local.get $y) (i32.add (local.get $t) (i32.const 2))
          (local.get $r) (local.get $rows))
        (call $store (local.get $a3) (local.get $scale) (local.get $bias)
          (local.get $y) (i32.add (local.get $t) (i32.const 3))
          (local.get $r) (local.get $rows))
        (local.set $x0 (local.get $x3))     ;; where the next four begin
        (local.set $t (i32.add (local.get $t) (i32.const 4)))
        (br_if $tokens (i32.lt_u (local.get $t) (local.get $T))))
      (local.set $r (i32.add (local.get $r) (i32.const 1)))
      (br_if $row (i32.lt_u (local.get $r) (local.get $rows))))))
